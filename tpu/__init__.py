"""Ahead-of-time compilation for TPU topologies (compile) and job launching (launch)."""
