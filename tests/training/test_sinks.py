import json
import sys
import types

import pytest

from dsv3.errors import UserError
from dsv3.recipe.schema import LoggingSection
from dsv3.training.metrics import Metrics
from dsv3.training.sinks import check_sinks, open_sinks


@pytest.fixture
def service(monkeypatch):
    """A package with the calls that wandb and trackio share; what it heard."""
    heard = []
    module = types.ModuleType("trackio")
    module.__spec__ = types.SimpleNamespace(name="trackio")
    module.init = lambda **options: heard.append(("init", options))
    module.log = lambda figures, step: heard.append(("log", step, figures))
    module.finish = lambda: heard.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return heard


def test_a_service_hears_of_every_record(tmp_path, service):
    section = LoggingSection(sinks=("trackio",), project="small")
    check_sinks(section)
    with Metrics(tmp_path, sinks=open_sinks(section, "run-1", {"a": 1})) as metrics:
        metrics.step({"step": 3, "loss": 2.5, "grad_norm": None, "max_vio": {"1": 0.5}})
        metrics.evaluation({"step": 3, "bits_per_byte": {"x": 1.5}})
    assert service == [
        ("init", {"project": "small", "name": "run-1", "config": {"a": 1}}),
        ("log", 3, {"train/loss": 2.5, "train/max_vio/1": 0.5}),
        ("log", 3, {"evaluation/bits_per_byte/x": 1.5}),
        ("finish",),
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.5


def test_a_package_that_is_not_there_is_refused_before_anything_runs(tmp_path, make_trainer, monkeypatch):
    monkeypatch.setattr("dsv3.training.sinks.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"logging.sinks names 'wandb', which is not installed: pip install wandb"):
        make_trainer(tmp_path, 'logging.sinks=["wandb"]')
    with pytest.raises(UserError, match=r"logging\.sinks"):
        make_trainer(tmp_path, 'logging.sinks=["mlflow"]')
    assert not list(tmp_path.iterdir())
