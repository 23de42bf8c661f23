"""The parts of `coterie analyze`: weights (`similarity`, `alignment`), outputs (`probe`, `bits`), routing (`locality`),
and what is made of them: sentences (`advice`) and a page (`shown`)."""
