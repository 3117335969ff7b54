"""Weights that ship inside packages: each script of docs/real-models.md against the package's own forward pass."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.models import SCRIPTS
from benchmarks.tables import RESULTS, ROOT
from tests.processes import output_of
from tests.tolerances import REAL_MODEL, REAL_MODEL_QUANTIZED


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    return importlib.import_module


def agrees(case: Any, tolerance: float = REAL_MODEL) -> None:
    """Both of ours, relative to the largest value of the original."""
    expected = case.original()
    largest = np.max(np.abs(expected))
    assert largest > 0.1
    for ours in (case.numpy(), case.onnx()):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * largest, err_msg=f"{case.model}, {case.part}")


@pytest.mark.models
def test_words_by_their_letters(examples: Any) -> None:
    script = examples("real_chars2vec")
    for size in (50, 100, 150, 200, 300):
        assert len(script.alphabet(size)) == script.load(size).parts[0].input_size
        agrees(script.case(size))


@pytest.mark.models
@pytest.mark.filterwarnings("ignore:unclosed file .*homographs.en:ResourceWarning")
def test_phonemes_are_those_of_the_package(examples: Any) -> None:
    script = examples("real_g2p_en")
    words = ("activationist", "portnorm", "zyzzyva", "layernormalization", "x", "naïve")
    for word, case in zip(words, script.cases(words), strict=True):
        agrees(case)
        theirs = script.original()
        for scores in (case.numpy(), case.onnx()):
            phonemes = [theirs.idx2p[k] for k in scores.argmax(axis=-1) if k != script.END]
            assert phonemes == theirs.predict(word)


@pytest.mark.models
@pytest.mark.parametrize("name", ["ws-gru-mesa", "wrn-gru-mesa", "wrn-gru-mesa-weighted"])
def test_sleep_stages_with_masked_epochs(examples: Any, name: str) -> None:
    script = examples("real_sleepecg")
    x = script.night(40, 3)
    mask = script.mask_of(x)
    assert not mask[:, :4].any()
    assert 0.1 < 1 - mask[:, 4:].mean() < 0.3, "holes beside the padding in front"
    agrees(script.case(name, epochs=40, batch=3))


@pytest.mark.models
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("file", ["ONNX", "JIT"])
def test_voice_activity_chunk_by_chunk(examples: Any, file: str, rate: int) -> None:
    case = examples("real_silero_vad").case(file, rate)
    found = case.original()
    assert found.min() < 0.1 < 0.5 < found.max(), "the voice comes and goes"
    agrees(case)


@pytest.mark.models
def test_letters_in_pictures(examples: Any) -> None:
    script = examples("real_ddddocr")
    for case in script.cases():
        agrees(case, REAL_MODEL_QUANTIZED if script.QUANTIZED in case.part else REAL_MODEL)


@pytest.mark.models
def test_voices(examples: Any) -> None:
    (case,) = examples("real_resemblyzer").cases(3)
    agrees(case)


@pytest.mark.models
def test_a_script_prints_what_it_measures() -> None:
    printed = output_of("""
import runpy, sys
sys.path.insert(0, "docs/examples")
runpy.run_path("docs/examples/real_g2p_en.py", run_name="__main__")
""")
    assert "g2p-en, scores of each phoneme of 'activationist'" in printed
    assert "the original " in printed


def test_a_package_that_is_missing_is_named(examples: Any) -> None:
    side_by_side: ModuleType = examples("side_by_side")
    with pytest.raises(SystemExit, match="no-such-model is not installed; `make models`"):
        side_by_side.package_file("no-such-model", "weights.h5")
    with pytest.raises(SystemExit, match=r"numpy \S+ has no file weights.h5; `make models`"):
        side_by_side.package_file("numpy", "weights.h5")


def test_every_script_is_in_the_table() -> None:
    kept = json.loads((RESULTS / "models.json").read_text())
    assert [row["script"] for row in kept["scripts"]] == [script.name for script in SCRIPTS]
    packages = {line.partition("==")[::2] for line in (ROOT / "docs/examples/real-models.txt").read_text().split() if "==" in line}
    assert {(name, version) for name, version in kept["packages"].items()} == packages
