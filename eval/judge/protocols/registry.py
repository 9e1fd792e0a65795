"""The ways of asking a judge: PROTOCOLS is the list, `find_protocol` takes one of it or a user's file."""

from __future__ import annotations

from eval.judge.protocols.files import is_file, read_protocol
from eval.judge.protocols.protocol import Grade, Protocol
from otpo.errors import UserError

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "preference",
            verdict="pair",
            template="preference.txt",
            max_tokens=1,
            about="which of two outputs is better; our prompt, read as AlpacaEval 2 reads its own",
        ),
        Protocol(
            "summary",
            verdict="pair",
            template="summary.txt",
            max_tokens=1,
            about="which of two summaries is better; our prompt, in the spirit of DPO's TL;DR study (arXiv 2305.18290)",
        ),
        Protocol(
            "tldr",
            verdict="pair",
            template="tldr.txt",
            max_tokens=200,
            about="as DPO's TL;DR study asks: one sentence that compares two summaries, then the better one; it should "
            "be precise and concise",
        ),
        Protocol(
            "alpaca_eval",
            verdict="pair",
            template=None,
            max_tokens=1,
            about="AlpacaEval 2's official prompt (Apache-2.0), from the alpaca_eval package",
            # alpaca_eval itself takes any mass and any token; its judge's least mass in 2,408 replies is 0.85.
            least_mass=0.01,
            bare=True,
        ),
        Protocol(
            "arena_hard",
            verdict="grades",
            template="arena_hard.txt",
            max_tokens=4096,
            about="in the style of Arena-Hard: the judge answers for itself first, then grades two outputs in five "
            "steps, in both orders; a strong win counts three times in the score",
            reads=("text", "json", "tool"),
            both_orders=True,
            grades=(
                Grade("A>>B", 1.0, 3.0),
                Grade("A>B", 1.0),
                Grade("A=B", 1.5),
                Grade("B>A", 2.0),
                Grade("B>>A", 2.0, 3.0),
            ),
        ),
        Protocol(
            "mt_bench",
            verdict="grades",
            template="mt_bench.txt",
            max_tokens=2048,
            about="in the style of MT-Bench: which of two outputs is better, in both orders; where these do not agree "
            "it is a tie",
            reads=("text", "json", "tool"),
            both_orders=True,
            agreed=True,
            grades=(Grade("A", 1.0), Grade("B", 2.0), Grade("C", 1.5)),
        ),
        Protocol(
            "mt_bench_single",
            verdict="rating",
            template="mt_bench_single.txt",
            max_tokens=2048,
            about="in the style of MT-Bench's single score: one output at a time, an explanation, then 1 to 10",
            reads=("text", "json", "tool"),
        ),
        Protocol(
            "rating",
            verdict="rating",
            template="rating.txt",
            max_tokens=4,
            top_logprobs=20,
            about="one output at a time, rated from 1 to 10",
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name, or of that file.

    Raises:
        UserError: there is none, or the file is no protocol.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if is_file(name):
        return read_protocol(name, PROTOCOLS)
    raise UserError(f"judge.protocol: expected one of {', '.join(PROTOCOLS)}, or a YAML file; found '{name}'.")


def protocol_label(name: str) -> str:
    """What a board calls the protocol that `judge.protocol` names; "reward" is a reward model's."""
    return find_protocol(name).label if is_file(name) else name
