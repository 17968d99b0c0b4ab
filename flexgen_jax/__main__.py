from flexgen_jax.cli.app import main

main(prog_name="flexgen-jax")
