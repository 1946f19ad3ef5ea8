"""Running on TPUs: compiling for them without one (compile), and launching jobs (launch)."""
