"""Programs: parse flags, build a configuration, call one function of mmx."""
