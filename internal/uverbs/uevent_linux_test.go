package uverbs

import (
	"strings"
	"testing"
)

// removal is what Linux 6.1 says when uverbs4 goes.
const removal = "remove@/devices/virtual/infiniband_verbs/uverbs4\x00ACTION=remove\x00DEVPATH=/devices/virtual/infiniband_verbs/uverbs4\x00" +
	"SUBSYSTEM=infiniband_verbs\x00MAJOR=231\x00MINOR=196\x00DEVNAME=infiniband/uverbs4\x00SEQNUM=1389\x00"

func TestParseUevent(t *testing.T) {
	e, err := parseUevent([]byte(removal))
	if want := (uevent{"remove", "infiniband_verbs", "infiniband/uverbs4"}); err != nil || e != want {
		t.Errorf("%+v, %v", e, err)
	}
	// Cut short, without the last zero: what is there counts.
	e, err = parseUevent([]byte(removal[:strings.Index(removal, "MAJOR")+3]))
	if want := (uevent{"remove", "infiniband_verbs", ""}); err != nil || e != want {
		t.Errorf("%+v, %v", e, err)
	}
	for _, bad := range []string{"", "\x00", "remove@/devices/x", "@/devices/x\x00ACTION=remove\x00", "libudev\x00\xfe\xed\xca\xfeACTION=remove\x00"} {
		if e, err := parseUevent([]byte(bad)); err == nil {
			t.Errorf("%q is %+v", bad, e)
		}
	}
}

func FuzzParseUevent(f *testing.F) {
	f.Add([]byte(removal))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseUevent(b)
		if err != nil {
			if e != (uevent{}) {
				t.Errorf("%+v beside %v", e, err)
			}
			return
		}
		again, err := parseUevent([]byte("x@y\x00ACTION=" + e.action + "\x00SUBSYSTEM=" + e.subsystem + "\x00DEVNAME=" + e.devname))
		if err != nil || again != e {
			t.Errorf("%+v, then %+v, %v", e, again, err)
		}
	})
}
