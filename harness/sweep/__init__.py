"""Search a W&B sweep file on this machine, without a server."""
