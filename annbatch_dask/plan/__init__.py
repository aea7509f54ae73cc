"""The plan of a build: pure, frozen values. Opens nothing and imports no engine."""
