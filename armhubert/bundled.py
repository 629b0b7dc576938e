"""What comes with the package, so that everything works offline."""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"

TEACHER = _ASSETS / "teacher-mini"
"""A HuBERT of 5.6 M parameters, in Hugging Face's format."""

SPEECH = _ASSETS / "speech"
"""LibriSpeech's layout: train-mini, dev-mini and test-mini, of different speakers, and a lexicon."""

TRAINING_SPEECH, TEST_SPEECH = SPEECH / "train-mini", SPEECH / "test-mini"
"""What is distilled on where no data is named, and what no student of that has heard."""
