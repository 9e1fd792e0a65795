"""What several test files share: real data where it is at hand, and a tiny real model."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.generate.pool import EnginePool

# A shell's background job ignores SIGINT, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Wall time per example says nothing on a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

SENTENCES = [
    "The capital of Mongolia is Ulaanbaatar, which lies at about 1,350 metres above the sea.",
    "Water boils at 100 °C at sea level; on a high mountain it boils earlier, because the pressure is lower.",
    "Please summarize the following letter in one sentence, and keep the names of both sisters.",
    "She sold the old bicycle, bought a newer one, and rode it to work every morning until the winter came.",
    "I am sorry, but I cannot see any picture here. Could you describe what it shows?",
    "La réponse est oui: le café crème coûte trois euros cinquante. 谢谢你的帮助。 😀",
    "A list:\n1. measure twice,\n2. cut once,\n3. sweep the floor.\n",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "The train leaves at a quarter past nine, so we should meet at the station no later than nine o'clock.",
    "No. The whale is a mammal, not a fish: it breathes air and feeds its young with milk.",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside a developer's checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at hand: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama (hidden 64, 2 heads of 32) and its BPE tokenizer with a chat template."""
    from otpo.models.fresh import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = make_tokenizer(SENTENCES, vocab_size=512)
    make_model(tokenizer, hidden=64, layers=2, heads=2, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharp_models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of `tiny_llama`'s shape: large weights, so that tokens are seldom nearly tied; many end tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = []
    for seed in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.4, generator=generator)
        model.generation_config.eos_token_id = [model.config.eos_token_id, *range(45, 480, 60)]
        folders.append(tmp_path_factory.mktemp(f"sharp_{seed}"))
        model.save_pretrained(folders[-1])
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process with 2 CPUs; the dashboard is on because Ray Train's cleaner needs it."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.shutdown()  # what a test before left, which started Ray by training
    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def vllm_pool(ray_cluster: None, sharp_models: list[Path]) -> Iterator[EnginePool]:
    """One real vLLM engine in a Ray actor, with the first of `sharp_models` loaded and a context of 128 tokens."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from pipeline.generate.engine import EngineConfig
    from pipeline.generate.pool import EnginePool

    config = EngineConfig(backend="vllm", device="cpu", max_model_len=128, batch_size=16)
    with EnginePool(config, sharp_models[0]) as pool:
        yield pool


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A group of one process, over gloo."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a size, such as "64k"."""
    mounted: list[Path] = []

    def disk(size: str) -> Path:
        folder = tmp_path / f"small{len(mounted)}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The label's folder of `support.command.workers_recipe`, trained without a fault."""
    from support.command import driving, workers_recipe

    with driving(workers_recipe(tmp_path_factory.mktemp("undisturbed"), tiny_llama)) as driver:
        assert driver.wait() == 0, driver.log.read_text()
        assert len(driver.family) > 5 and not driver.left_behind()
    return driver.label


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server of this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket, which this process and its children can reach."""
    from pyarrow.fs import S3FileSystem

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": s3_server}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    server = s3_server.removeprefix("http://")
    files = S3FileSystem(endpoint_override=server, scheme="http", region="us-east-1", allow_bucket_creation=True)
    files.create_dir("bucket")
    files.delete_dir_contents("bucket")
    return "s3://bucket"
