#!/usr/bin/env bash
# cluster/mlflow_server.sh --host=ADDRESS --port=5000 --allowed-hosts=NAME:5000,... [options of `mlflow server`]
# Starts MLflow with its basic-auth app: whoever asks must give a name and a password, but for /health. The first start
# makes the account `ml2o`, which may do everything. Compose, Kubernetes and the README's lines for Slurm call this.
#   MLFLOW_BACKEND_STORE_URI   where runs and accounts are kept, without a password
#   ML2O_SECRETS [/run/secrets]   a folder of two files: mlflow-password, of at least 12 characters, and
#                                 postgres-password, which only a store in PostgreSQL needs
# No password is ever on a command line or in a URI, where `ps` or a log shows it to everybody on the machine.
set -euo pipefail
umask 077

secrets="${ML2O_SECRETS:-/run/secrets}"
store="${MLFLOW_BACKEND_STORE_URI:?set it: sqlite:////var/tmp/mlflow.db or postgresql+psycopg2://mlflow@postgres:5432/mlflow}"
own="$(mktemp -d)"

secret() { # NAME: print the secret; a file that is missing or empty ends the script
    [ -s "$secrets/$1" ] && [ -r "$secrets/$1" ] || { echo "mlflow_server.sh: $secrets/$1 is missing, empty or not readable" >&2; exit 1; }
    printf '%s' "$(< "$secrets/$1")"
}

case "$store" in
    *://*:*@*) echo "mlflow_server.sh: MLFLOW_BACKEND_STORE_URI has a password: put it into $secrets/postgres-password" >&2; exit 1 ;;
    postgres*)
        password="$(secret postgres-password)"
        password="${password//\\/\\\\}"
        printf '*:*:*:*:%s\n' "${password//:/\\:}" > "$own/pgpass" # libpq reads it where it is this user's alone
        export PGPASSFILE="$own/pgpass" ;;
esac

# One worker makes accounts and answers alike, and a key of this start's own signs what a browser sends back to it.
MLFLOW_AUTH_ADMIN_PASSWORD="$(secret mlflow-password)"
MLFLOW_FLASK_SERVER_SECRET_KEY="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
cat > "$own/auth.ini" <<INI
[mlflow]
default_permission = READ
database_uri = ${store//%/%%}
admin_username = ml2o
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Checking a password takes tens of milliseconds: for this many seconds a good one is not checked again.
auth_cache_ttl_seconds = 60
INI
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_AUTH_CONFIG_PATH="$own/auth.ini"
export MLFLOW_BACKEND_STORE_URI MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
exec mlflow server --app-name=basic-auth --workers=1 "$@"
