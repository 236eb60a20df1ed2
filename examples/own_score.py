"""A score of one's own: weigh tokens by how surprised the teacher is at what the student wrote.

kdrl train examples/tiny.yaml method=opd plugins=examples/own_score.py 'objective.distill.scale={surprise: 3.0}' \
  --output runs/own-score

A score gives one number per token, [C], without gradient; `reads` says what it looks at: data, student or teacher
(log-probs of the tokens), distributions, entries, or batch (all tokens of the step). Its settings are recipe keys.
"""

from kdrl import register_score


@register_score("surprise", reads="teacher")
def surprise(tokens, cap: float = 5.0):
    """-log p of the token, at most `cap`."""
    return (-tokens.logp_C).clamp(max=cap)
