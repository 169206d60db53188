//! Nothing: this package holds only the tests and benches that span crates.
