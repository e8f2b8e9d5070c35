"""Operations: thin Prefect flows over ``diffusion``, the command line and the local stack."""
