"""`python -m pipeline` is `trimline`; `deepspeed --module pipeline pretrain RECIPE` starts a stage's ranks by hand."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
