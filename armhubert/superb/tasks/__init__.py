"""The tasks of SUPERB, one module each. `TASKS` has an instance of each, in the order of SUPERB's table."""

from armhubert.errors import ArmhubertError, nearest
from armhubert.superb.task import Task
from armhubert.superb.tasks.asr import SpeechRecognition
from armhubert.superb.tasks.ks import KeywordSpotting
from armhubert.superb.tasks.pr import PhonemeRecognition
from armhubert.superb.tasks.sid import SpeakerIdentification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PhonemeRecognition(),
        SpeechRecognition(),
        KeywordSpotting(),
        SpeakerIdentification(),
    )
}


def find(name: str) -> Task:
    """The task called `name`; an unknown name is an ArmhubertError that names the nearest."""
    if name not in TASKS:
        raise ArmhubertError(f"unknown task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]
