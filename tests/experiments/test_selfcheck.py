"""The check that users run on their own device."""
import jax.numpy as jnp
import pytest

from experiments import selfcheck
from experiments.selfcheck import Check, checks, errors_of, main


def _scaled(implementation, x):
    if implementation == "lacking":
        raise NotImplementedError("no such chip")
    return {"reference": 1.0, "good": 1.0, "wrong": 1.001, "nan": jnp.nan}[implementation] * x


def _check(*implementations):
    return Check("scaled", "three numbers", _scaled, (jnp.arange(1.0, 4.0),), implementations)


def test_errors_are_relative_and_nan_is_infinite():
    errors = dict(errors_of(_check("good", "wrong", "nan"), "float32"))
    assert errors["good"] == (0, 0)
    assert errors["wrong"] == (pytest.approx(1e-3, rel=1e-3), pytest.approx(1e-3, rel=1e-3))
    assert errors["nan"] == (float("inf"), float("inf"))


def test_a_wrong_implementation_is_named_and_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "checks", lambda platform: [_check("good", "lacking", "wrong")])
    with pytest.raises(SystemExit, match="differs from its reference"):
        main([])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("ABOVE 2e-06") for line in lines) == 1
    assert sum(line.endswith("not run: no such chip") for line in lines) == 2, "one for each dtype"
    monkeypatch.setattr(selfcheck, "checks", lambda platform: [_check("good")])
    main([])


def test_kernels_are_checked_on_their_own_platform_only():
    def implementations(platform):
        return {name for check in checks(platform) for name in check.implementations}

    assert "pallas_tpu" in implementations("tpu") and "pallas_tpu" not in implementations("cpu")
