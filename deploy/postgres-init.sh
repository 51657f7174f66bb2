#!/bin/sh
# Users and databases of MLflow and Prefect; the image runs this once, on an empty volume.
set -eu
psql --quiet --set ON_ERROR_STOP=1 --username postgres <<'SQL'
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
\getenv prefect_password PREFECT_DATABASE_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect FROM PUBLIC;
SQL
