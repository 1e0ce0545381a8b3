"""Sequence mixers: interchangeable layers that let tokens exchange information.

Every mixer is a linen module with one signature:

    out, state = mixer(x, positions=None, segment_ids=None, state=None, train=False)

x, out       (B, T, D)
positions    (B, T) integers; None counts from the start of each document, or on
             from the state
segment_ids  (B, T); a run of equal ids is a document, and documents do not see
             each other. Padding is a document of its own
state        None while training. Otherwise what earlier calls have seen, a plain
             value from `mixer.init_state(batch, max_length, dtype)`; it continues
             the document of x's first token, and the one returned belongs to the
             document of x's last token. Keeping the old value undoes a call

`causal=False` lets tokens see those that follow, where a mixer defines that.
Names: `jaxmodels.list_mixers()`; `jaxmodels.create_mixer("gated_delta")`.
"""
