"""The offline search of a W&B sweep file, without a server."""
