"""What is read of DeepSpeed's configuration in its source, against DeepSpeed itself."""

from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config.deepspeed_keys import check_section, model_of
from pipeline.config.ds_config import open_ds_config
from pipeline.distributed import prepare_deepspeed
from pipeline.errors import UserError

prepare_deepspeed()
from deepspeed.comm.config import CommsLoggerConfig  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig  # noqa: E402

MODELS = [
    ("runtime/zero/config", DeepSpeedZeroConfig),
    ("comm/config", CommsLoggerConfig),
    ("utils/config", DeepSpeedThroughputTimerConfig),
]


def model(field):
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def keys(kind):
    """Every key of a model under both its names, with its section where that is a model too."""
    names = {}
    for key, field in kind.model_fields.items():
        names |= {name: model(field) for name in (key, field.alias) if name}
    return names


@pytest.mark.parametrize(("module", "theirs"), MODELS)
def test_the_source_has_the_keys_of_the_models(module, theirs):
    ours = model_of(module, theirs.__name__)
    assert keys(ours).keys() == keys(theirs).keys()
    for name, section in keys(ours).items():
        assert section is None or keys(section).keys() == keys(keys(theirs)[name]).keys()
    assert module != "runtime/zero/config" or keys(ours)["offload_optimizer"] is not None


VALUES = [True, 0, 1, -1, 2.0, 2.5, "1", "on", "x", "auto", None, [], ["x"], {}, {"device": "cpu"},
          {"device": "x"}, {"x": 1}]  # fmt: skip


@pytest.mark.parametrize(("module", "theirs"), MODELS)
def test_nothing_that_deepspeed_takes_is_refused(module, theirs):
    ours, refused = model_of(module, theirs.__name__), 0
    for key in keys(theirs):
        for value in VALUES:
            try:
                check_section("ds.json", "section", {key: value}, ours)
            except UserError as error:
                refused += key in str(error)
                with pytest.raises((ValidationError, TypeError)):
                    theirs(**{key: value})
    assert refused > 3 * len(keys(theirs))  # and most of what it refuses is


def test_an_unknown_module_takes_anything():
    for module, name in (("runtime/zero/config", "No"), ("nowhere", "No"), ("comm/config", "log")):
        check_section("ds.json", "section", {"x": 1}, model_of(module, name))


def test_what_deepspeed_documents_is_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        """{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9,
        "offload_param": {"device": "nvme", "nvme_path": "/local", "pin_memory": true},
        "reduce_bucket_size": "auto", "overlap_comm": null},
        "flops_profiler": {"enabled": true, "profile_step": 1, "output_file": null},
        "aio": {"block_size": 262144, "queue_depth": 32, "single_submit": false},
        "comms_logger": {"enabled": true, "prof_ops": ["all_reduce"]},
        "timers": {"throughput": {"enabled": true, "synchronized": false}},
        "communication_data_type": "FP32", "steps_per_print": 1e9, "dump_state": 0}"""
    )
    assert open_ds_config(path)["zero_optimization"]["stage"] == 3
