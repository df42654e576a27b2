"""Models behind HTTP: an OpenAI-compatible API and metrics, by one engine per model.

`config` (torch-free: what the command line asks for) · `served` (a checkpoint ready to answer) · `protocol` (what a
request may say) · `answers` (the engine's tokens as pieces of text, awaited) · `forms` (an answer as OpenAI writes it)
· `respond` (whole or streamed) · `api` (the routes) · `guard` (who may ask, and how much) · `connection` (uvicorn's,
bounded) · `refusal` (errors) · `metrics` · `server` (the verb).
"""
