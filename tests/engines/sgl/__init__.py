"""SGLang engines under test. The folder is not called as the engine is: its processes import from here."""
