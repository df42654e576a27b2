"""From a model to text: sampling, generation with a carried state, chat, and the score of a text.

`config` (torch-free: what the command line asks for) · `sampler` (logits to ids) · `decoding` (ids to more ids, a
token a step) · `text` (an answer's, token by token) · `generate` (text to text) · `chat` · `score`.
"""
