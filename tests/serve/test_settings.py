import dataclasses
import math
from typing import get_args

import pytest
import yaml

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from serve import settings
from serve.settings import ServerConfig, load, read_yaml


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return path

    return write


def test_nothing_given_is_the_defaults():
    assert load({}) == (EngineConfig(), ServerConfig())


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(file, monkeypatch):
    path = file("page_size: 8\nmax_num_seqs: 8\nnum_pages: 8\nhost: 127.0.0.8\ndrain_timeout_s: 8")
    monkeypatch.setenv("JAXSERVE_PAGE_SIZE", "16")
    monkeypatch.setenv("JAXSERVE_MAX_NUM_SEQS", "16")
    monkeypatch.setenv("JAXSERVE_HOST", "127.0.0.16")
    engine, server = load({"page_size": 32, "num_pages": None, "host": None}, path)
    assert (engine.page_size, engine.max_num_seqs, engine.num_pages, engine.seed) == (32, 16, 8, 0)
    assert (server.host, server.drain_timeout_s, server.grpc_port) == ("127.0.0.16", 8.0, 8001)


def test_every_engine_field_can_be_set_from_the_file(file):
    """A field that EngineConfig gains is a setting at once, and arrives."""
    legal = {"dtype": "float32", "page_size": 8, "gpu_memory_utilization": 0.5, "max_num_batched_tokens": 32}
    legal |= {"enable_prefix_caching": False, "logprobs_mode": "processed", "max_num_seqs": 4, "token_buckets": [8, 32], "sequence_buckets": [1, 4]}
    samples = {int: 3, float: 0.25, bool: True, str: "some"}
    values = {}
    for field in dataclasses.fields(EngineConfig):
        hint = settings.field_types()[field.name]
        of_its_type = [samples[kind] for kind in (*get_args(hint), hint) if kind in samples]
        values[field.name] = legal[field.name] if field.name in legal else of_its_type[0]
        assert values[field.name] != field.default
    engine, _ = load({}, file(yaml.safe_dump(values)))
    got = dataclasses.asdict(engine)
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in got.items()} == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_modle_len: 5", r"max_modle_len is no setting\. Did you mean max_model_len\? Known are .*attention_backend"),
        ("max-model-len: 5", "max-model-len is no setting. Did you mean max_model_len?"),
        ("zzz: 5", r"zzz is no setting\. Known are "),
        ("seed: 1\nseed: 2", "serve.yaml:2: seed is there twice"),
        ("model: &a toy\ntokenizer: *a", "serve.yaml:1: anchors and aliases"),
        ("- model", "must hold one mapping"),
        ("just words", "must hold one mapping"),
        ("1: 2", "must hold one mapping"),
        ("model: [", "is no YAML"),
        ("model: !!python/object/apply:os.system ['true']", "is no YAML"),
        ("max_num_seqs: true", "max_num_seqs must be a whole number or none, got true"),
        ("max_num_seqs: 1.5", "max_num_seqs in the file must be a whole number or none, got 1.5"),
        ("max_num_seqs: [1]", "max_num_seqs in the file must be a whole number"),
        ("drain_timeout_s: soon", "drain_timeout_s in the file must be a number, got 'soon'"),
        ("reflection: 7", "reflection in the file must be true or false"),
        ("page_size: 7", "page_size must be a power of two"),
        ("grpc_port: 65536", r"grpc_port must be in \[0, 65535\]"),
        ("drain_timeout_s: .nan", "drain_timeout_s must be in"),
        ("write_timeout_s: 0", "write_timeout_s must be in"),
        ("max_pending_tokens: 0", "max_pending_tokens must be at least 1"),
        ("max_queued_tokens: 0", "max_queued_tokens must be at least 1"),
        ("max_queued_requests: -1", "max_queued_requests must be in"),
        ("log_level: loud", "log_level must be one of debug, info, warning, error"),
        ("host: ''", "host must be an address"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(file, text, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?") if "\\" not in message else message) as caught:
        load({}, file(text))
    assert "\n" not in str(caught.value)


def test_wrong_flags_and_variables_are_named_as_they_were_given(monkeypatch):
    with pytest.raises(ConfigError, match=r"^--max-num-seqs must be a whole number or none, got 'x'"):
        load({"max_num_seqs": "x"})
    monkeypatch.setenv("JAXSERVE_GRPC_PORT", "tcp://10.0.0.1:8001")  # what Kubernetes sets beside a service of that name
    with pytest.raises(ConfigError, match=r"^JAXSERVE_GRPC_PORT must be a whole number, got 'tcp://10\.0\.0\.1:8001'"):
        load({})


def test_several_numbers_are_a_sequence_in_the_file_and_commas_elsewhere(file, monkeypatch):
    assert load({"token_buckets": "8,32"})[0].token_buckets == (8, 32)
    assert load({}, file("token_buckets: [8, 32]"))[0].token_buckets == (8, 32)
    monkeypatch.setenv("JAXSERVE_TOKEN_BUCKETS", "16,64")
    assert load({}, file("token_buckets: [8, 32]"))[0].token_buckets == (16, 64)
    with pytest.raises(ConfigError, match=r"--token-buckets must be whole numbers such as 32,128 or none, got '?x"):
        load({"token_buckets": "x,1"})


def test_an_empty_file_is_no_settings(file):
    assert read_yaml(file("")) == {}
    assert read_yaml(file("# nothing\n")) == {}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml cannot be read"):
        load({}, tmp_path / "none.yaml")


def test_the_two_parts_share_no_name():
    engine, server = ({field.name for field in dataclasses.fields(kind)} for kind in (EngineConfig, ServerConfig))
    assert not engine & server


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ServerConfig)])
def test_infinite_numbers_are_refused(field):
    if settings.field_types()[field] is float:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ConfigError, match=field):
                ServerConfig(**{field: value})
    else:
        assert settings.type_name(settings.field_types()[field])


def test_a_yaml_key_is_a_name(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("? [a]\n: toy\n")
    with pytest.raises(ConfigError, match=r"server.yaml:1: a key must be a name"):
        settings.read_yaml(path)
