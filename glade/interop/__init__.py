"""Models from wherever they lie: `load` finds what a path or a hub name holds and returns a `LanguageModel`."""
