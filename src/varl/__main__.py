from varl.cli import run

run()
