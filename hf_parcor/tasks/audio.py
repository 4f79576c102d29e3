"""Recordings: files, bytes or samples, at the sampling rate that is asked for."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_parcor.errors import one_line

Samples: TypeAlias = NDArray[np.float32]
_EMPTY = "a recording without a sample"


def read_audio(recording: Any, rate: int) -> Samples:
    """Return the samples of a recording, the mean of its channels, at a sampling rate.

    Args:
        recording: A file, its bytes, or a mapping as `datasets` has them: `bytes` or `path`, or `array` (samples, or
            channels × samples) and `sampling_rate`.
        rate: Samples a second. Another rate is resampled by soxr.

    Returns:
        Samples between −1 and 1, one-dimensional.

    Raises:
        ValueError: It is no recording, or has no sample.
        OSError: There is no such file.
        ImportError: soundfile or soxr is not installed.
    """
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        found: Samples = np.atleast_2d(np.asarray(recording["array"], np.float32)).mean(0)
        own_rate = int(recording["sampling_rate"])
    else:
        with _opened(recording) as sound:
            found, own_rate = sound.read(dtype="float32", always_2d=True).mean(1), sound.samplerate
    if not found.size:
        raise ValueError(_EMPTY)
    if own_rate == rate:
        return found
    resampled: Samples = _library("soxr").resample(found, own_rate, rate)
    return resampled


def audio_seconds(recording: Any) -> float:
    """Return how long a recording is; of a file only the header is read.

    Raises:
        ValueError: As for `read_audio`, and so are the other errors.
    """
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        count, rate = np.shape(recording["array"])[-1], recording["sampling_rate"]
    else:
        with _opened(recording) as sound:
            count, rate = sound.frames, sound.samplerate
    if not count:
        raise ValueError(_EMPTY)
    return float(count / rate)


def check_installed() -> None:
    """Refuse to go on without what reads and resamples recordings.

    Raises:
        ImportError: soundfile or soxr is not installed.
    """
    for name in ("soundfile", "soxr"):
        _library(name)


def _opened(recording: Any) -> Any:
    """Return an open file of soundfile.

    Raises:
        ValueError: It cannot be read.
        ImportError: soundfile is not installed.
    """
    soundfile = _library("soundfile")
    if isinstance(recording, Mapping):
        content = recording.get("bytes")
        recording = recording.get("path") if content is None else content
    if isinstance(recording, (bytes, bytearray)):
        recording = io.BytesIO(recording)
    elif isinstance(recording, (str, Path)):
        if not Path(recording).is_file():
            raise FileNotFoundError(f"no file {recording}")
        recording = str(recording)
    else:
        raise ValueError(f"neither a file nor the bytes of one, but {type(recording).__name__}")
    try:
        return soundfile.SoundFile(recording)
    except soundfile.SoundFileError as error:
        raise ValueError(one_line(error)) from error


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"recordings need {name}; install it with: pip install 'hf-parcor[audio]'") from error
