from flexgen_jax.cli.entry import main

main()
