from varl.cli import program

program()
