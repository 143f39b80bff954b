"""Tables and constants of the domain as they are promised: written out here, never imported from what they test."""

import errno
from typing import Any

import pytest

from app.domain.access import Principal, Scope
from app.domain.adapters import ADAPTERS
from app.domain.full_disk import disk_full
from app.domain.inputs import jsonl
from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS, TRANSITIONS
from app.domain.methods import METHODS, RECIPES, WeightSpec
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import Calibration, Evaluation, JobRequest
from app.domain.request.sources import BuiltinText
from bitwright.job_states import FINAL_STATUSES


def test_the_transitions_of_a_job() -> None:
    assert {before.value: {after.value for after in those} for before, those in TRANSITIONS.items()} == {
        "queued": {"running", "cancelled"},
        "running": {"succeeded", "failed", "cancelled", "queued"},
        "succeeded": set(),
        "failed": {"queued"},
        "cancelled": {"queued"},
    }
    assert {status.value for status in FINAL_STATUSES} == {"succeeded", "failed", "cancelled"}


def test_a_job_is_tried_three_times_more() -> None:
    assert MAX_RETRIES_WITHOUT_PROGRESS == 3


WEIGHTS: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": True, "kv_cache": None}
NO_GOAL: dict[str, Any] = {"at_most": None, "fits": None}
NAMED: dict[str, Any] = {**NO_GOAL, "scheme": None}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "rtn": {**NAMED, "scale_search": True, "weights_only": False},
    "nf": {"double_quantization": True, "weights_only": False},
    "gptq": {**NAMED, "damping": 0.01, "act_order": True, "sweeps": 0},
    "awq": {**NAMED, "search_samples": 32, "clip_search": True, "quantized_inputs": False},
    "omniquant": {
        **{"preset": "default", "epochs": 20, "batch_size": 1, "learning_rate": 0.005, "aug_loss": False},
        **NO_GOAL,
    },
    "signround": {
        **{"preset": "default", "steps": 200, "batch_size": 8, "learning_rate": None, "scale_search": True},
        **{"quantized_inputs": True, "quick_steps": False, "scale_steps": 0, **NAMED},
    },
    "loftq": {"base": "normal-float", "double_quantization": False, "rank": 64, "alpha": 16.0, "iterations": 5},
    "apiq": {
        **{"symmetric": False, "preset": "default", "granularity": "block", "rank": 64, "alpha": 16.0, "steps": 512},
        **{"batch_size": 1, "learning_rate": 0.0005, "range_learning_rate": 0.005, "weight_decay": 0.1},
        **{"aug_loss": False, "base": "rtn", "freeze_base": False},
    },
    "lq-lora": {
        **{
            "bits": {"average": 2.75, "choices": (2, 3, 4, 8), "over": "linears", "outer": False},
            "rank": 64,
            "alpha": 16.0,
            "iterations": 100,
        },
        **{"fisher": True, "group_sizes": (16, 32, 64), "absmax_bits": (2, 3, 4, 8), "superblocks": (16, 64, 256)},
        **{"absmax_dtypes": ("bfloat16", "float16", "float32")},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_a_method(method: str) -> None:
    modules: dict[str, Any] = {"ignore": ("lm_head",), "overrides": {}, "embeddings": None, "head": None}
    expected = {"method": method, "modules": modules, **WEIGHTS, **METHOD_DEFAULTS[method]}
    assert METHODS[method].spec().model_dump() == expected


PRESETS: dict[str, dict[str, tuple[dict[str, int], int, int]]] = {
    "signround": {
        "light": ({"steps": 50, "scale_steps": 0}, 128, 2048),
        "default": ({"steps": 200, "scale_steps": 0}, 128, 2048),
        "best": ({"steps": 200, "scale_steps": 100}, 128, 2048),
        "max": ({"steps": 200, "scale_steps": 400}, 128, 2048),
    },
    "omniquant": {
        "light": ({"epochs": 5, "aug_loss": False}, 128, 512),
        "default": ({"epochs": 20, "aug_loss": False}, 128, 2048),
        "best": ({"epochs": 40, "aug_loss": True}, 128, 2048),
    },
    "apiq": {
        "light": ({"steps": 128}, 128, 512),
        "default": ({"steps": 512}, 128, 2048),
        "best": ({"steps": 2560}, 128, 2048),
    },
}


def test_the_presets_of_the_methods() -> None:
    found = {
        method: {name: (dict(p.spec), p.num_samples, p.sequence_length) for name, p in info.presets.items()}
        for method, info in METHODS.items()
        if info.presets
    }
    assert found == PRESETS
    coarse = {name: dict(preset.coarse) for name, preset in METHODS["signround"].presets.items()}
    assert coarse == {"light": {}, "default": {}, "best": {"scale_steps": 400}, "max": {"scale_steps": 1200}}
    further = {name: preset.further for name, preset in METHODS["signround"].presets.items()}
    assert further == {"light": 0, "default": 0, "best": 512, "max": 1408}


def test_what_the_recipes_stand_for() -> None:
    assert {name: dict(recipe) for name, recipe in RECIPES.items()} == {
        "auto-round": {"method": "signround"},
        "auto-round-light": {"method": "signround", "preset": "light"},
        "auto-round-best": {"method": "signround", "preset": "best"},
        "lq-lora-unweighted": {"method": "lq-lora", "fisher": False},
        "apiq-bw": {"method": "apiq", "granularity": "block"},
        "apiq-lw": {"method": "apiq", "granularity": "layer"},
    }
    codebook, affine = {"method": "nf"}, {"method": "rtn", "symmetric": False}
    assert {name: recipe.expands_to() for name, recipe in ADAPTER_RECIPES.items()} == {
        "qlora": {**codebook, "adapter": {"kind": "lora"}},
        "qa-lora": {**affine, "adapter": {"kind": "qa-lora"}},
        "q-bara": {**codebook, "adapter": {"kind": "q-bara"}},
        "q-blora": {**codebook, "adapter": {"kind": "q-bara"}},
        "qa-hira": {**affine, "adapter": {"kind": "qa-hira"}},
        "qa-blora": {**affine, "adapter": {"kind": "qa-blora"}},
        "bayesian-lora": {**codebook, "adapter": {"kind": "bayesian-lora"}},
    }


@pytest.mark.parametrize(
    ("kind", "rate", "fields"),
    [
        ("lora", 2e-4, {}),
        ("qa-lora", 1.6e-3, {"pooling": "mean"}),
        ("q-bara", 4e-4, {"pooling": "mean", "pool_in": 2, "repeat_out": 2}),
        ("qa-hira", 3.2e-3, {"pooling": "mean", "pool_in": None, "repeat_out": None}),
        ("qa-blora", 1.6e-3, {"pooling": "mean", "pool_in": None, "repeat_out": 2}),
        ("bayesian-lora", 2e-4, {"penalty": 0.1, "gate_learning_rate": 0.05}),
    ],
)
def test_the_defaults_of_an_adapter(kind: str, rate: float, fields: dict[str, Any]) -> None:
    assert ADAPTERS[kind].spec().model_dump() == {"kind": kind, "rank": 16, "alpha": 16.0, "dropout": 0.0, **fields}
    assert ADAPTERS[kind].learning_rate == rate


def test_the_rates_of_a_request_that_is_silent() -> None:
    """A sum over a pool is as large as an input; a gate may travel 27 in all its steps."""

    def rate(**fields: Any) -> float:
        body = {"model": "a/b", "finetune": {"dataset": "upl_0abc"}, "method": "qa-lora", **fields}
        finetune = JobRequest.parse(body).finetune
        assert finetune is not None
        return finetune.learning_rate

    assert rate() == 1.6e-3
    assert rate(adapter={"pooling": "sum"}) == 2e-4
    assert rate(finetune={"dataset": "upl_0abc", "learning_rate": 0.5}) == 0.5
    for steps, expected in ((27, 1.0), (270, 0.1), (10, 1.0)):
        body = {"model": "a/b", "method": "bayesian-lora", "finetune": {"dataset": "upl_0abc", "steps": steps}}
        adapter = JobRequest.parse(body).model_dump()["adapter"]
        assert adapter["gate_learning_rate"] == expected


def test_the_defaults_of_texts() -> None:
    assert (Calibration().num_samples, Calibration().sequence_length, Calibration().tokens_read) == (128, 2048, 262_144)
    assert (Evaluation().num_samples, Evaluation().sequence_length, Evaluation().tokens_read) == (32, 1024, 32_768)
    assert Finetune(dataset=BuiltinText()).model_dump(exclude={"dataset"}) == {
        **{"steps": 200, "batch_size": 8, "sequence_length": 512, "learning_rate": 2e-4, "warmup_share": 0.03},
        **{"schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.3, "loss_on": "completion", "packing": True},
        **{"validation_share": 0.05, "validation_sequences": 64, "validation_every": None, "patience": None},
        **{"checkpoint_every": 50, "gradient_checkpointing": None, "epochs": None},
    }


def test_the_tokens_and_the_warm_up_of_a_training() -> None:
    text = {"dataset": {"source": "builtin"}, "steps": 10, "batch_size": 3, "sequence_length": 20}
    section = Finetune.model_validate({**text, "validation_sequences": 7, "warmup_share": 0.25})
    assert section.tokens_read == (10 * 3 + 7) * 20
    assert section.warmup_steps() == 2
    assert Finetune.model_validate({**text, "validation_share": 0.0}).tokens_read == 10 * 3 * 20
    for missing in ({}, {"validation_every": 2, "validation_share": 0.0}):
        with pytest.raises(ValueError, match="patience needs"):
            Finetune.model_validate({**text, "patience": 1, **missing})
    assert Finetune.model_validate({**text, "patience": 1, "validation_every": 2}).patience == 1


@pytest.mark.parametrize(("epochs", "sequences", "steps"), [(1.0, 16, 2), (2.5, 17, 6), (0.01, 3, 1), (None, 99, 200)])
def test_epochs_are_steps_over_all_sequences(epochs: float | None, sequences: int, steps: int) -> None:
    config = Finetune.model_validate({"dataset": {"source": "builtin"}, "epochs": epochs})
    assert config.of_sequences(sequences).steps == steps  # of 8 sequences each


def test_a_training_is_as_long_as_one_of_both_says() -> None:
    with pytest.raises(ValueError, match="by steps or by epochs"):
        Finetune.model_validate({"dataset": {"source": "builtin"}, "epochs": 2.0, "steps": 50})


@pytest.mark.parametrize(
    ("method", "fields", "tuned", "shared", "original"),
    [
        ("rtn", {}, 0, 0, False),
        ("nf", {}, 0, 0, True),
        ("gptq", {}, 20, 840, False),
        ("awq", {"search_samples": 5}, 20 + 8 * 5, 840, True),
        ("awq", {"search_samples": 50, "quantized_inputs": True}, 20 + 8 * 20, 840, False),
        ("omniquant", {"epochs": 3, "batch_size": 4}, 60, 4, False),
        ("omniquant", {"epochs": 0, "batch_size": 4}, 0, 0, False),
        ("signround", {"steps": 10, "batch_size": 8}, 80, 8, False),
        ("signround", {"steps": 10, "batch_size": 30, "quantized_inputs": False}, 200, 30, True),
        ("signround", {"steps": 200, "quick_steps": True}, 150 * 4 + 50 * 8, 8, False),
        ("signround", {"steps": 200, "batch_size": 1, "quick_steps": True}, 200, 1, False),
        ("signround", {"steps": 0}, 0, 0, False),
        ("loftq", {}, 0, 0, True),
        ("apiq", {"steps": 10, "batch_size": 2}, 20, 2, False),
        ("apiq", {"steps": 10, "batch_size": 12, "base": "signround"}, 120 + 200 * 8, 4, False),
        ("apiq", {"steps": 0, "granularity": "layer"}, 0, 0, True),
        ("lq-lora", {}, 0, 0, False),
    ],
)
def test_what_a_method_costs_shares_and_looks_at(
    method: str, fields: dict[str, Any], tuned: int, shared: int, original: bool
) -> None:
    spec: WeightSpec = METHODS[method].spec.model_validate(fields)
    assert spec.tuned_sequences(20) == tuned
    assert spec.shared_batch() == shared
    assert spec.needs_original_inputs() is original


def test_the_methods_that_read_text() -> None:
    assert {name for name, info in METHODS.items() if not info.needs_calibration} == {"rtn", "nf", "loftq"}
    budget = {"bits": {"average": 4.5}}
    assert {name for name, info in METHODS.items() if info.spec().needs_preparation()} == {"lq-lora"}
    assert METHODS["rtn"].spec.model_validate(budget).reads_text()
    plain = {"bits": 4, "fisher": False}
    assert not METHODS["lq-lora"].spec.model_validate(plain).reads_text()
    assert METHODS["signround"].spec.model_validate({"scale_steps": 7}).end_to_end_steps() == 7
    assert {name for name, info in METHODS.items() if info.spec().factors_rank()} == {"loftq", "apiq", "lq-lora"}


@pytest.mark.parametrize(
    ("held", "allowed"),
    [
        (set(), set()),
        ({"read"}, {"read"}),
        ({"submit"}, {"read", "submit"}),
        ({"admin"}, {"read", "submit", "admin"}),
        ({"read", "submit"}, {"read", "submit"}),
    ],
)
def test_a_scope_includes_those_before_it(held: set[str], allowed: set[str]) -> None:
    principal = Principal("tenant", "key", frozenset(map(Scope, held)))
    assert {scope.value for scope in Scope if principal.allows(scope)} == allowed


def test_a_disk_is_full_by_its_size_or_a_quota() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert disk_full(OSError(number, "x"))
    for error in (OSError(errno.EIO, "x"), OSError("no number"), ValueError(errno.ENOSPC), OSError(errno.ENOMEM, "x")):
        assert not disk_full(error)


def test_a_line_of_text_is_at_most_sixteen_mebibytes() -> None:
    assert jsonl.MAX_LINE_BYTES == 16_777_216
