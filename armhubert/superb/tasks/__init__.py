"""The tasks of SUPERB, one module each. `TASKS` has an instance of each, in the order of SUPERB's table."""

from armhubert.errors import ArmhubertError, nearest
from armhubert.superb.task import Task
from armhubert.superb.tasks.asr import SpeechRecognition
from armhubert.superb.tasks.asv import SpeakerVerification
from armhubert.superb.tasks.er import EmotionRecognition
from armhubert.superb.tasks.ic import IntentClassification
from armhubert.superb.tasks.ks import KeywordSpotting
from armhubert.superb.tasks.mini import MiniPhonemes
from armhubert.superb.tasks.pr import PhonemeRecognition
from armhubert.superb.tasks.qbe import QueryByExample
from armhubert.superb.tasks.sd import SpeakerDiarization
from armhubert.superb.tasks.sf import SlotFilling
from armhubert.superb.tasks.sid import SpeakerIdentification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PhonemeRecognition(),
        SpeechRecognition(),
        KeywordSpotting(),
        QueryByExample(),
        SpeakerIdentification(),
        SpeakerVerification(),
        SpeakerDiarization(),
        IntentClassification(),
        SlotFilling(),
        EmotionRecognition(),
    )
}


MINI: dict[str, Task] = {task.name: task for task in (MiniPhonemes(),)}
"""What stands for SUPERB in `--suite mini`."""


def find(name: str) -> Task:
    """The task called `name`; an unknown name is an ArmhubertError that names the nearest."""
    known = TASKS | MINI
    if name not in known:
        others = {*TASKS, "similarity"} - {name}  # similarity is no task here, and one on the command line
        raise ArmhubertError(f"unknown task {name!r}{nearest(name, others)}")
    return known[name]
