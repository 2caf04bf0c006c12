//! `platter`: the administrator's command line. All logic is in the library.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    platter_tool::cli::main()
}
