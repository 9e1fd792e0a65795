"""What several test files share: real data where it is at hand, and a tiny real model."""

from pathlib import Path

import pytest
from hypothesis import settings

# Wall time per example says nothing on a busy machine.
settings.register_profile("busy", deadline=None)
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
    from otpo.fresh import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = make_tokenizer(SENTENCES, vocab_size=512)
    make_model(tokenizer, hidden=64, layers=2, heads=2, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
