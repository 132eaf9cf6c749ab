package conformance

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
)

// simProfiles are tried in turn, seed by seed. Acknowledgements are waited for 67 ms, seven times more.
var simProfiles = []simProfile{
	{"clean", simnet.Faults{Delay: 5 * time.Microsecond, Jitter: 20 * time.Microsecond}},
	{"lossy", simnet.Faults{Delay: 5 * time.Microsecond, Jitter: 10 * time.Microsecond, Loss: 0.02, Duplicate: 0.02, Corrupt: 0.01,
		Reorder: 0.05, ReorderBy: 200 * time.Microsecond, KeepRefusals: true}},
	{"partition", simnet.Faults{Delay: 50 * time.Microsecond, Jitter: 50 * time.Microsecond, Loss: 0.005, Every: 5 * time.Millisecond,
		For: 2 * time.Millisecond, KeepRefusals: true}},
}

// TestSim runs the table between two software NICs on networks in virtual time, which lose, repeat, reorder and change packets, or
// are cut off: each seed is another one. SEEDS says how many, SEED which one only, or, with SEEDS, the first; without either, each of
// a hundred runs a fifth of the table. PARTS is how many parts a seed runs one of: one, the whole table, with SEEDS or SEED.
func TestSim(t *testing.T) {
	first, seeds, parts := 0, 100, 5
	if testing.Short() || raceEnabled {
		seeds = 15
	}
	if n, err := strconv.Atoi(os.Getenv("SEED")); err == nil {
		first, seeds, parts = n, 1, 1
	}
	if n, err := strconv.Atoi(os.Getenv("SEEDS")); err == nil {
		seeds, parts = n, 1
	}
	if n, err := strconv.Atoi(os.Getenv("PARTS")); err == nil && n > 0 {
		parts = n
	}
	for seed := first; seed < first+seeds; seed++ {
		runSim(t, uint64(seed), parts)
	}
}

// runSim runs one of the parts of the table, and returns the traces of its cases.
func runSim(t *testing.T, seed uint64, parts int) map[string]string {
	n := uint64(len(simProfiles))
	p := &simPath{seed: seed, profile: simProfiles[seed%n], traces: map[string]string{}}
	t.Run(fmt.Sprintf("%d-%s", seed, p.profile.name), func(t *testing.T) {
		runUDP(t, path{name: "sim", sim: p, part: int(seed / n % uint64(parts)), parts: parts})
	})
	return p.traces
}

// Two runs from one seed are the same, packet by packet; from another seed, they are not. It has a part of the table, another one each
// time; SEEDS or PARTS=1, all of it.
func TestSimReplays(t *testing.T) {
	parts := 4
	if os.Getenv("SEEDS") != "" {
		parts = 1
	}
	all := path{}.share(t, parts)
	parts = all.parts
	for i, profile := range simProfiles {
		seed := uint64(i + all.part*len(simProfiles))
		once := runSim(t, seed, parts)
		again := runSim(t, seed, parts)
		other := runSim(t, seed+uint64(len(simProfiles)*parts), parts) // the same part
		if len(once) < 30 {
			t.Errorf("%s: %d cases", profile.name, len(once))
		}
		differ := 0
		for name, trace := range once {
			if again[name] != trace {
				t.Errorf("%s, seed %d, %s: trace %s, and %s when it is run again", profile.name, seed, name, trace, again[name])
			}
			if other[name] != trace {
				differ++
			}
		}
		if differ < 15 {
			t.Errorf("%s: with another seed, only %d of %d cases send other packets", profile.name, differ, len(once))
		}
	}
}
