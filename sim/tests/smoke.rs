//! A bounded piece of the swarm, so that every test run meets chance. Would miss: what needs
//! more seeds; `make sim` runs thousands.

#[test]
fn a_few_dozen_seeds() {
    for seed in 1..=60 {
        println!("seed {seed}: again with platter-sim --seed {seed}");
        platter_sim::swarm::run(seed);
    }
}
