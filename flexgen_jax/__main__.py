from flexgen_jax.cli import main

main()
