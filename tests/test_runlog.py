import json
import os

import pytest

from armhubert import ArmhubertError, runlog
from armhubert.runlog import RunLog, read_metrics

PNG = b"\x89PNG"


def filled(folder, steps=(1, 2, 3), start=0) -> None:
    log = RunLog(folder, start)
    for step in steps:
        log.add("train", step, {"loss": 1 / step}, (0.123456789, 2.0 / step))
    log.add("valid", steps[-1], {"loss": 0.5}, (0.5, 0.25))
    log.draw()
    log.close()


def test_rows_pictures_and_tensorboard_events_are_written(tmp_path):
    filled(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"kind": "train", "step": 1, "loss": 1.0, "layers": [0.123457, 2.0]}
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("train", 3), ("valid", 3)]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("loss.png", "layers.png"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/layer_01", "train/layer_02", "valid/loss", "valid/layer_01", "valid/layer_02",
    }  # fmt: skip
    assert [(event.step, event.value) for event in events.Scalars("train/layer_02")] == [
        (1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3)),
    ]  # fmt: skip


def test_what_is_not_finite_is_null(tmp_path):
    log = RunLog(tmp_path, 0)
    log.add("train", 1, {"loss": float("nan"), "gradient_norm": float("inf")}, (float("nan"), 0.5))
    log.draw()
    log.add("train", 2, {"loss": 0.5, "gradient_norm": 1.0}, (0.25, 0.5))
    log.draw()
    log.close()

    def refuse(name):
        raise AssertionError(name)

    first, _ = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=refuse) == {
        "kind": "train", "step": 1, "loss": None, "gradient_norm": None, "layers": [None, 0.5]
    }  # fmt: skip
    filled(tmp_path, steps=(3,), start=2)  # what is resumed is drawn too


def test_each_row_is_on_disk_as_soon_as_it_is_added(tmp_path):
    log = RunLog(tmp_path, 0)
    log.add("train", 1, {"loss": 1.0}, (1.0,))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_resuming_forgets_what_came_after_the_step_and_goes_on(tmp_path):
    filled(tmp_path)
    filled(tmp_path, steps=(3, 4), start=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    assert len(os.listdir(tmp_path / "tensorboard")) == 2


def test_starting_anew_forgets_everything(tmp_path):
    filled(tmp_path)
    filled(tmp_path, steps=(1,))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1]
    assert len(os.listdir(tmp_path / "tensorboard")) == 1


@pytest.mark.parametrize(
    "tail",
    [
        b'{"kind": "train", "st', b"\xff\xfe\n", b"[1]\n", b'{"step": "x"}\n', b"\n",
        b'{"step": 3, "loss": 1.0, "layers": [1.0, 1.0]}\n',
        b'{"kind": "train", "step": 3, "layers": [1.0, 1.0]}\n',
        b'{"kind": "train", "step": 3, "loss": 1.0}\n',
        b'{"kind": "train", "step": 3, "loss": "x", "layers": [1.0, 1.0]}\n',
        b'{"kind": "train", "step": 3, "loss": 1.0, "layers": ["x"]}\n',
    ],
)  # fmt: skip
def test_a_torn_or_foreign_last_line_is_left_out(tmp_path, tail):
    filled(tmp_path)
    whole = read_metrics(tmp_path / "metrics.jsonl")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert read_metrics(tmp_path / "metrics.jsonl") == whole
    filled(tmp_path, steps=(4,), start=3)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 4


def test_no_metrics_are_no_rows(tmp_path):
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "train", "step": 1, "loss": 1.0, "layers": [1.0]}],
        [{"kind": "train", "step": 1, "loss": float("nan"), "layers": [float("inf"), 0.0]}],
        [{"kind": "valid", "step": s, "loss": 0.0, "layers": [0.0] * 24} for s in range(3)],
        [{"kind": "train", "step": s, "loss": 1.0, "layers": [1.0] * (3 - s)} for s in range(3)],
    ],
)
def test_pictures_are_drawn_of_any_numbers_without_a_display_or_pyplots_state(tmp_path, rows, monkeypatch):
    import sys

    monkeypatch.delenv("DISPLAY", raising=False)
    before = "matplotlib.pyplot" in sys.modules
    runlog.draw_loss(rows, tmp_path / "loss.png")
    runlog.draw_layers(rows, tmp_path / "layers.png")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("loss.png", "layers.png"))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_full_disk_while_logging_is_one_clear_error_and_closing_hides_nothing(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0)

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        close = flush = write

    log._file.close()
    log._file = Full()
    monkeypatch.setattr(Full, "close", lambda self: self.write(""))
    with pytest.raises(ArmhubertError, match=r"cannot write in .*No space left on device; free space"):
        log.add("train", 1, {"loss": 1.0}, (1.0,))
    log.close()
