"""How weights get to a server: files, adapters, and vLLM's own transfers with stand-ins for vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from reflux.errors import ConfigError, ModelError, ServerError
from reflux.models import lora
from reflux.models.settings import Lora
from reflux.models.text import as_model
from reflux.runtime.weights import AdapterWeights, InMemory
from reflux.samplers.vllm_adapters import AdapterDelivery
from reflux.samplers.vllm_transfers import TransferDelivery
from reflux.samplers.vllm_weights import FileDelivery, Layout, ServedAdapter, shared_folder


@dataclass
class Server:
    """What a delivery calls."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    requests: Any = field(default_factory=lambda: type("Client", (), {"url": "http://server"}))

    async def load_files(self, files: Any, version: int) -> None:
        self.calls.append(("load_files", [file.name for file in files], version))

    async def label(self, version: int) -> None:
        self.calls.append(("label", version))

    async def load_adapter(self, name: str, folder: Path) -> None:
        self.calls.append(("load_adapter", name, (folder / "adapter_config.json").is_file()))

    async def forget_adapter(self, name: str) -> None:
        self.calls.append(("forget_adapter", name))

    async def pause(self) -> None:
        self.calls.append(("pause",))

    async def resume(self, version: int) -> None:
        self.calls.append(("resume", version))

    async def workers(self) -> int:
        return 2


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save(tiny.net(5).cpu(), tmp_path_factory.mktemp("student")))


def weights(version: int = 1, **more: Any) -> InMemory:
    return InMemory(version, tiny.net(6).cpu().state_dict().items, **more)


def given(delivery: Any, server: Any) -> None:
    asyncio.run(delivery.give(server))


def test_files_hold_the_names_of_the_checkpoint(student: Path, tmp_path: Path) -> None:
    delivery, server = FileDelivery(tmp_path, Layout.of(student), torch.bfloat16, 4096), Server()
    given(delivery, server)
    assert server.calls == [("label", 0)]
    delivery.take(weights())
    found = {name: value for file in delivery.files for name, value in load_file(file).items()}
    own = load_file(student / "model.safetensors")
    assert found.keys() == own.keys()
    assert "lm_head.weight" not in found
    state = tiny.net(6).cpu().state_dict()
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in found.items())
    assert len(delivery.files) > 2
    delivery.take(weights(2))
    assert sorted(tmp_path.iterdir()) == sorted(delivery.files)
    given(delivery, server)
    given(delivery, server)
    assert server.calls[1] == server.calls[2]
    assert server.calls[1][2] == 2


def test_only_the_tied_head_may_be_given_beside_the_files(student: Path, tmp_path: Path) -> None:
    state = tiny.net(6).cpu().state_dict()
    assert "lm_head.weight" in state
    delivery = FileDelivery(tmp_path, Layout.of(student), torch.float32)
    delivery.take(InMemory.of(state, 1))
    foreign = {"model.other.weight": state["model.norm.weight"]}
    with pytest.raises(ModelError, match=r"model\.other\.weight is not in its files"):
        delivery.take(InMemory.of({**state, **foreign}, 2))


def test_a_full_disk_is_told(student: Path, tmp_path: Path) -> None:
    delivery = FileDelivery(tmp_path / "missing", Layout.of(student), torch.float32)
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "version1-0.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"cannot be written to .*Set sampler\.weights_folder"):
        delivery.take(weights())


def test_the_folder_is_private_and_removed(tmp_path: Path) -> None:
    with shared_folder(str(tmp_path)) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


# --- adapters


def adapted() -> Any:
    from reflux.assets.characters import character_tokenizer

    model = as_model(tiny.net(5).cpu(), character_tokenizer())
    lora.attach(model, Lora(rank=2, alpha=6.0), seed=1)
    for name, value in model.net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    return model.net


def published(net: Any, version: int) -> InMemory:
    config = lora.adapter_config(net)
    assert config is not None
    adapter = AdapterWeights(config, lambda: lora.adapter_tensors(net))
    return InMemory(version, lambda: lora.full_weights(net), adapter=adapter)


def test_peft_computes_the_merged_weights_from_the_adapter(student: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    net = adapted()
    delivery = AdapterDelivery(tmp_path, FileDelivery(tmp_path, Layout.of(student), torch.float32))
    delivery.take(published(net, 3))
    loaded = PeftModel.from_pretrained(tiny.net(5).cpu(), tmp_path / "reflux-version3").merge_and_unload()
    expected = lora.merged(net)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert not torch.equal(
        loaded.state_dict()["model.layers.0.self_attn.q_proj.weight"],
        tiny.net(5).cpu().state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )


def test_requests_name_the_adapter_of_the_last_version(student: Path, tmp_path: Path) -> None:
    delivery = AdapterDelivery(tmp_path, FileDelivery(tmp_path, Layout.of(student), torch.float32))
    server, net = Server(), adapted()
    for version in range(1, 7):
        delivery.take(published(net, version))
        before = delivery.adapter
        given(delivery, server)
        assert delivery.adapter == ServedAdapter(f"reflux-version{version}", version)
        assert before != delivery.adapter
    assert [call for call in server.calls if call[0] == "load_adapter"] == [
        ("load_adapter", f"reflux-version{version}", True) for version in range(1, 7)
    ]
    assert [call[1] for call in server.calls if call[0] == "forget_adapter"] == [
        "reflux-version1",
        "reflux-version2",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"reflux-version{i}" for i in range(3, 7)]


def test_a_student_without_an_adapter_is_sent_merged(student: Path, tmp_path: Path) -> None:
    delivery = AdapterDelivery(tmp_path, FileDelivery(tmp_path, Layout.of(student), torch.float32))
    server = Server()
    delivery.take(published(adapted(), 3))
    given(delivery, server)
    delivery.take(weights(4))
    # until the server has the weights
    assert delivery.adapter == ServedAdapter("reflux-version3", 3)
    given(delivery, server)
    assert server.calls[1:] == [("load_files", ["version4-0.safetensors"], 4)]
    assert delivery.adapter is None
    with pytest.raises(ModelError, match="the server has merged weights"):
        delivery.take(published(adapted(), 5))


def test_an_adapter_that_others_cannot_compute_is_not_offered() -> None:
    assert lora.adapter_config(tiny.net(5)) is None
    net = adapted()
    config = lora.adapter_config(net)
    assert config is not None
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    assert json.dumps(config)


# --- vLLM's own transfers


@dataclass
class TrainerSide:
    """Sends what its source gives."""

    about: Any
    client: Any
    source: Any
    sent: list[dict[str, torch.Tensor]] = field(default_factory=list)
    fails: bool = False

    def send_weights(self) -> None:
        if self.fails:
            raise RuntimeError("NCCL error")
        meta = self.source.metadata()
        self.sent.append(dict(self.source))
        assert [(one.name, one.shape) for one in meta] == [
            (name, tuple(value.shape)) for name, value in self.sent[-1].items()
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[TrainerSide]:
    """The names of vLLM 0.32 that the trainer's side uses."""
    made: list[TrainerSide] = []

    class Factory:
        @classmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any) -> TrainerSide:
            made.append(TrainerSide(init_info, client, source))
            return made[-1]

    @dataclass
    class Meta:
        name: str
        dtype: torch.dtype
        shape: tuple[int, ...]

    @dataclass
    class Nccl:
        master_address: str
        master_port: int
        world_size: int
        rank: int

    @dataclass
    class Ipc:
        packed: bool
        rank: int

    transfer = ModuleType("vllm.distributed.weight_transfer")
    vars(transfer).update(
        WeightTransferTrainerFactory=Factory,
        HTTPVLLMWeightSyncClient=lambda url: url,
        ParamMeta=Meta,
        WeightSource=object,
    )
    names = {
        "vllm": ModuleType("vllm"),
        "vllm.distributed": ModuleType("vllm.distributed"),
        "vllm.distributed.weight_transfer": transfer,
        "vllm.distributed.weight_transfer.ipc_engine": ModuleType("ipc"),
        "vllm.distributed.weight_transfer.nccl_engine": ModuleType("nccl"),
    }
    vars(names["vllm.distributed.weight_transfer.ipc_engine"]).update(IPCTrainerInitInfo=Ipc)
    vars(names["vllm.distributed.weight_transfer.nccl_engine"]).update(NCCLTrainerInitInfo=Nccl)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_a_transfer_sends_each_weight_once(student: Path, vllm: list[TrainerSide], backend: Any) -> None:
    delivery, server = TransferDelivery(backend, Layout.of(student), torch.bfloat16, 0), Server()
    given(delivery, server)
    assert server.calls == [("label", 0)]
    for version in (1, 2):
        delivery.take(weights(version))
        given(delivery, server)
    (side,) = vllm
    assert side.client == "http://server"
    if backend == "nccl":
        assert (side.about.world_size, side.about.rank) == (3, 0)
    assert len(side.sent) == 2
    assert side.sent[0].keys() == load_file(student / "model.safetensors").keys()
    assert {value.dtype for value in side.sent[0].values()} == {torch.bfloat16}
    assert server.calls[1:] == [
        call for version in (1, 2) for call in (("pause",), ("label", version), ("resume", version))
    ]


def test_a_server_that_is_new_is_connected_again(student: Path, vllm: list[TrainerSide]) -> None:
    delivery = TransferDelivery("ipc", Layout.of(student), torch.float32, 0)
    delivery.take(weights())
    for server in (Server(), Server()):
        given(delivery, server)
    assert [len(side.sent) for side in vllm] == [1, 1]


def test_weights_that_may_have_changed_are_not_sent_again(student: Path, vllm: list[TrainerSide]) -> None:
    delivery = TransferDelivery("ipc", Layout.of(student), torch.float32, 2)
    delivery.take(weights())
    given(delivery, Server())
    with pytest.raises(ServerError, match="Continue the run with --resume"):
        given(delivery, Server())


def test_a_transfer_that_fails_is_an_error_of_the_server(student: Path, vllm: list[TrainerSide]) -> None:
    delivery, server = TransferDelivery("ipc", Layout.of(student), torch.float32, 0), Server()
    delivery.take(weights())
    given(delivery, server)
    vllm[0].fails = True
    with pytest.raises(ServerError, match="transfer of weights failed: NCCL error"):
        given(delivery, server)


def test_a_transfer_without_vllm_is_refused(student: Path) -> None:
    delivery = TransferDelivery("nccl", Layout.of(student), torch.float32, 0)
    delivery.take(weights())
    with pytest.raises(ConfigError, match="needs vLLM beside reflux"):
        given(delivery, Server())


def test_shapes_are_compared_before_a_transfer(student: Path, vllm: list[TrainerSide]) -> None:
    state = {**tiny.net(6).cpu().state_dict(), "model.norm.weight": torch.ones(3)}
    delivery = TransferDelivery("nccl", Layout.of(student), torch.float32, 0)
    with pytest.raises(ModelError, match="Nothing was sent"):
        delivery.take(InMemory.of(state, 1))
    assert vllm == []
