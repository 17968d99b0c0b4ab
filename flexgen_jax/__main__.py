from flexgen_jax.cli import main

main(prog_name="flexgen-jax")
