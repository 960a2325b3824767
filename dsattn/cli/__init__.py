"""The command line. ``dsattn.cli.app.main`` is the ``dsattn`` command."""
