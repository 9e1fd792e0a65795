"""The judge: a model behind an HTTP endpoint that compares or rates outputs.

config            settings (`judge` in a recipe)
protocols         the ways of asking
prompt_templates  fills `prompts/*.txt` with an instruction and its outputs
replies           reads a verdict from a reply; `reading` its words and its tokens' probabilities
check             whether the judge can be asked at all
client            asks many questions: concurrency, retries, budget, store
endpoint          one HTTP call, and the ways it can fail
budget, store     what calls cost; replies that are already there
verdicts          pairwise judging: the table of verdicts
ratings           outputs rated one at a time
reward_scores     a reward model in the judge's place
"""
