"""A judge of one's own: vLLM's OpenAI server, on a GPU of the cluster where there is one, for as long as it judges.

    with served(config) as config:
        judge_task(Judge(config, store), ...)

The server is asked by the same client as any other endpoint. It runs in processes of its own, which end with the body,
or with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2

from eval.judge.config import JudgeConfig, ServedModel
from otpo.dtypes import TORCH_NAMES
from otpo.errors import UserError, WorkError
from pipeline.generate.backends import CPU_ENVIRONMENT, cpu_settings
from pipeline.generate.model_folder import ModelFolder, check_servable, check_shared, open_model, why_not_vllm
from pipeline.judge import until_closed
from pipeline.progress import Progress, silent

KEY = "OTPO_SERVED_JUDGE_KEY"  # the environment variable of the server's key, which is drawn anew for each server
MOST_TOKENS = 16_384  # of a question and its reply; a model's own limit may want more memory than a GPU has
LAST_LINES = 12  # of the server's log, shown where it does not start

Server = tuple[str, Callable[[], None]]
"""(address, what ends the server)."""


def check_served(key: str, served: ServedModel) -> ModelFolder:
    """Find out whether vLLM can serve a model as a judge; nothing is started.

    Args:
        key: of the recipe, or the option, that names the model.

    Raises:
        UserError: vLLM is not installed, or there is no such model, or none that answers messages.
    """
    from pipeline.cluster.placement import has_gpu

    if find_spec("vllm") is None:
        raise UserError(f"{key}: vLLM is not installed here. Install it, or set judge.url to a server that is there.")
    model = open_model(served.model)
    check_servable(model, template="chat", max_model_len=served.max_model_len)
    if reason := why_not_vllm(model, on_cpu=not (has_gpu() or _visible_gpus())):
        raise UserError(f"{key}: vLLM cannot serve {model.name}: {reason}.")
    check_shared(model, served.tensor_parallel_size, f"{key}'s tensor_parallel_size")
    return model


@contextmanager
def served(config: JudgeConfig, progress: Progress = silent) -> Iterator[JudgeConfig]:
    """The judge's settings with an address that answers. A judge that has one is left as it is.

    The model goes by `served_name`, so that stored replies of other weights under the same name are not taken for its
    own.

    Raises:
        UserError: as `check_served`, or no node has the GPUs.
        WorkError: the server did not start.
    """
    if config.vllm is None:
        yield config
        return
    from pipeline.cluster.placement import has_gpu

    model = check_served("judge.vllm", config.vllm)
    name, key = served_name(config), secrets.token_urlsafe(24)
    progress("judge", 0, 0, f"vLLM loads {model.name}")
    start = _start_on_cluster if has_gpu() else _start_here
    address, end = start(config.vllm, model, name, key)
    os.environ[KEY] = key
    try:
        yield config.model_copy(update={"url": address, "model": name, "api_key_env": KEY, "vllm": None})
    finally:
        del os.environ[KEY]
        end()


def served_name(config: JudgeConfig) -> str:
    """What the server calls the model of `config.vllm`: the judge's name, and eight digits of the weights' hash.

    Raises:
        UserError: there is no such model.
    """
    assert config.vllm is not None
    return f"{config.model}@{open_model(config.vllm.model).digest[:8]}"


def _start_here(served: ServedModel, model: ModelFolder, name: str, key: str) -> Server:
    server = _Server(served, model, name, key, "127.0.0.1")
    return server.address, server.end


def _start_on_cluster(served: ServedModel, model: ModelFolder, name: str, key: str) -> Server:
    """As `_start_here`, in an actor that holds the GPUs: the driver's machine may have none."""
    import ray

    from pipeline.cluster.placement import SERVED_SIZE, actor_options, check_engines, live_nodes

    gpus = served.gpus
    options = actor_options(gpus, check_engines(1, gpus, live_nodes(), key=SERVED_SIZE)[0])
    actor: Any = ray.remote(_ServerActor).options(**options).remote()
    try:
        address = ray.get(
            actor.start.remote(served, model, name, key, ray.util.get_node_ip_address()),
            timeout=2 * served.start_timeout,  # until the actor has its GPUs, and then until the server answers
        )
    except ray.exceptions.RayError as error:
        ray.kill(actor)
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError | WorkError):
            raise cause from None
        raise WorkError(f"The judge {model.name} could not be served: {cause or error}.") from error

    def end() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.end.remote(), timeout=3 * until_closed.PATIENCE)
        ray.kill(actor)

    return address, end


class _ServerActor:
    """A server on the node whose GPUs this actor holds."""

    def __init__(self) -> None:
        self.server: _Server | None = None

    def start(self, served: ServedModel, model: ModelFolder, name: str, key: str, driver: str) -> str:
        """The server's address as the driver reaches it. Only a driver on this node needs no more than loopback."""
        import ray

        here = model if model.path.is_dir() else open_model(model.name)
        own = ray.util.get_node_ip_address()
        self.server = _Server(served, here, name, key, "127.0.0.1" if own == driver else own)
        return self.server.address

    def end(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.end()


class _Server:
    """vLLM's server as a process that ends with this one. It answers once it is constructed."""

    def __init__(self, served: ServedModel, model: ModelFolder, name: str, key: str, host: str) -> None:
        self.address = f"http://{host}:{_free_port(host)}/v1"
        handle, log = tempfile.mkstemp(prefix="otpo-judge-", suffix=".log")
        self.log = Path(log)
        with os.fdopen(handle, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, until_closed.__file__, *_command(served, model, name, self.address)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment(key),
            )
        try:
            self._wait(model, key, served.start_timeout)
        except BaseException:
            self.end()
            raise

    def _wait(self, model: ModelFolder, key: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        with httpx2.Client(trust_env=False, timeout=5.0, headers={"Authorization": f"Bearer {key}"}) as client:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    raise WorkError(f"vLLM could not serve the judge {model.name}. Its last words:\n{self._said()}")
                with contextlib.suppress(httpx2.HTTPError):
                    if client.get(f"{self.address}/models").status_code == 200:
                        return
                time.sleep(0.25)
        raise WorkError(
            f"vLLM did not serve the judge {model.name} within {seconds:.0f} s (judge.vllm.start_timeout). Its last"
            f" words:\n{self._said()}"
        )

    def _said(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join([*lines[-LAST_LINES:], f"The whole log: {self.log} on {socket.gethostname()}."])

    def end(self) -> None:
        """End the server and wait until it has let go of its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _command(served: ServedModel, model: ModelFolder, name: str, address: str) -> list[str]:
    on_gpu = _visible_gpus()
    limit = served.max_model_len or min(model.own_limit or MOST_TOKENS, MOST_TOKENS)
    dtype = served.dtype if served.dtype != "auto" else ("bf16" if on_gpu else "fp32")
    host, port = address.removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
    settings: dict[str, Any] = {
        "model": model.path,
        "served_model_name": name,
        "host": host,
        "port": port,
        "dtype": TORCH_NAMES[dtype],
        "max_model_len": limit,
        "generation_config": "vllm",  # no sampling setting comes silently from the model's folder
        "seed": 0,
        "disable_uvicorn_access_log": True,
    }
    if on_gpu:
        settings |= {
            "tensor_parallel_size": served.tensor_parallel_size,
            "data_parallel_size": served.data_parallel_size,
            "gpu_memory_utilization": served.gpu_memory_utilization,
        }
    else:
        settings |= cpu_settings(model, limit, dtype)
    options = [part for setting, value in settings.items() for part in _option(setting, value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]


def _option(setting: str, value: object) -> list[str]:
    """A setting of vLLM's as its server's command line spells it."""
    name = setting.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _visible_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _environment(key: str) -> dict[str, str]:
    """The key is not on the command line, where every user of the machine could read it."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} if hasattr(os, "sched_getaffinity") else {}
    common = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return common if _visible_gpus() else {**common, **CPU_ENVIRONMENT, **threads}


def _free_port(host: str) -> int:
    with socket.socket() as taken:
        taken.bind((host, 0))
        return int(taken.getsockname()[1])
