"""What is in a reply: `text` reads its words, `logprobs` the probabilities of its tokens."""
