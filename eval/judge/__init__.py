"""The judge: a model behind an HTTP endpoint that compares or rates outputs.

config            settings (`judge` in a recipe)
protocols         the ways of asking, as data; fills the templates of `prompts`
asking            the forms in which an endpoint can be asked, and finding out which of them it takes
check             whether the judge can be asked at all
client            asks many questions: concurrency, retries, budget, store
endpoint          one HTTP call, and the ways it can fail
budget, store     what calls cost; replies that are already there
replies           reads a verdict from a reply; `reading` its words and its tokens' probabilities
verdicts          judges a model's outputs beside a reference's
single            outputs that the judge sees one at a time
table             the table of verdicts
ratings           ratings for on-policy pairs
reward_scores     a reward model in the judge's place
"""
