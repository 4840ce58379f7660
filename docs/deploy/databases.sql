-- What Postgres makes when it starts for the first time.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
