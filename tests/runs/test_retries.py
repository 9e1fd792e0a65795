"""Which failures of a worker are retried: real errors, raised where training would raise them."""

from __future__ import annotations

import json

import pytest
import torch

from otpo.errors import UserError, WorkError
from pipeline.train.faults.policy import FAILURE_FILE, SEEN_FILE, writing_failures


def attempt(folder, fails, note: str = "dpo, step 5") -> list[str] | None:
    """One attempt of the worker; what it wrote to the failure file, after which Ray's retries do nothing."""
    with pytest.raises(Exception) as raised:
        with writing_failures(folder / FAILURE_FILE):
            try:
                fails()
            except Exception as error:
                error.add_note(note)
                raise
    assert raised.value.__notes__ == [note], "the error itself is not replaced"
    return json.loads((folder / FAILURE_FILE).read_text()) if (folder / FAILURE_FILE).exists() else None


def full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 10_000)
        file.flush()


def wrapped_full_disk() -> None:
    try:
        full_disk()
    except OSError as error:
        raise RuntimeError("checkpoint failed on ranks [0]") from error


def beyond_the_vocabulary() -> None:
    torch.nn.Embedding(4, 2)(torch.tensor([7]))


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (full_disk, ["dpo, step 5: ", "disk is full", "No space left on device", "train.keep_checkpoints"]),
        (wrapped_full_disk, ["disk is full"]),
        (beyond_the_vocabulary, ["dpo, step 5: ", "index is out of range", "vocabulary", "data.max_length"]),
    ],
)
def test_what_the_same_rows_cause_every_time_is_not_retried(tmp_path, fails, words):
    kind, told = attempt(tmp_path, fails) or ["", ""]
    assert kind == "WorkError"
    for word in words:
        assert word in told, told


def test_wrong_input_keeps_its_words(tmp_path):
    def fails() -> None:
        raise UserError("no such row")

    assert attempt(tmp_path, fails) == ["UserError", "no such row"]


def test_out_of_memory_on_the_same_batch_is_retried_once(tmp_path):
    sizes = iter((3, 5, 4))

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {next(sizes)}.00 GiB. GPU 0 has ...")

    assert attempt(tmp_path, out_of_memory) is None
    assert attempt(tmp_path, out_of_memory, note="dpo, step 9") is None, "another batch: it may fit on a second try"
    kind, told = attempt(tmp_path, out_of_memory) or ["", ""]
    assert kind == "WorkError" and "came twice" in told and "train.micro_batch_tokens" in told and "step 5" in told


def test_the_memory_of_a_cpu(tmp_path):
    def out_of_memory() -> None:
        torch.empty(2**50)

    assert attempt(tmp_path, out_of_memory) is None
    assert "train.micro_batch_tokens" in (attempt(tmp_path, out_of_memory) or ["", ""])[1]


def test_any_other_error_is_retried_until_it_comes_again(tmp_path):
    def fails(text: str):
        def fail() -> None:
            raise ValueError(text)

        return fail

    assert attempt(tmp_path, fails("no row 3")) is None
    assert attempt(tmp_path, fails("cannot read the shard")) is None
    kind, told = attempt(tmp_path, fails("no row 3")) or ["", ""]
    assert kind == WorkError.__name__ and "ValueError: no row 3" in told and "third time" in told
    assert len(json.loads((tmp_path / SEEN_FILE).read_text())) == 2


def test_the_death_of_another_worker_is_retried_as_often_as_ray_does(tmp_path):
    def peer_is_gone() -> None:
        raise RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3021")

    for _ in range(4):
        assert attempt(tmp_path, peer_is_gone) is None


def test_a_model_that_the_hub_does_not_have_is_not_tried_again(tmp_path):
    def no_model() -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co': check your internet connection")

    assert attempt(tmp_path, no_model) is None
    assert "came twice" in (attempt(tmp_path, no_model) or ["", ""])[1]
