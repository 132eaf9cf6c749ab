package cycles

import "testing"

func TestTrusts(t *testing.T) {
	for _, tt := range []struct {
		source    string
		inProcess bool
		ok        bool
	}{
		{"tsc", false, true},
		{"kvm-clock", true, true},
		{"kvm-clock", false, false},
		{"hpet", true, false},
	} {
		if err := trusts(tt.source, func() bool { return tt.inProcess }); (err == nil) != tt.ok {
			t.Errorf("%s, read in process %v: %v", tt.source, tt.inProcess, err)
		}
	}
}
