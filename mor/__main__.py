from mor.cli import main

main()
