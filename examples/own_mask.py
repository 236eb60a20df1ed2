"""A mask of one's own: apply a term only to responses of groups that the student finds hard.

kdrl train examples/tiny.yaml method=kdrl plugins=examples/own_mask.py 'objective.distill.mask={hard_group: 0.5}' \
  --output runs/own-mask

It returns a bool per response, [B]; with per="token" one per token, [N]. One setting may stand in the recipe.
"""

import kdrl


@kdrl.register_mask("hard_group")
def hard_group(context, share: float = 0.5):
    """Responses of groups in which at most `share` of the responses are right."""
    same_BB = context.group_B[:, None] == context.group_B[None, :]
    right_B = (same_BB & context.correct_B[None, :]).sum(1) / same_BB.sum(1)
    return right_B <= share
