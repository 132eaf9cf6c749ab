package testutil

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// comment is the severity of what the capture itself says of a packet (PI_COMMENT of Wireshark's proto.h).
const comment = "1048576"

// chat is the severity of what is usual (PI_CHAT).
const chat = "2097152"

// note is the severity of what is unusual, and no error (PI_NOTE).
const note = "4194304"

// guessed are protocols that tshark takes a payload for if it looks a little like them, as one of a few bytes does like rpcordma.
var guessed = []string{"rpcordma", "smc", "smb_direct", "nvme-rdma", "lnet", "iser", "infiniband.eoib", "infiniband_sdp", "fcoib"}

// Tshark has tshark dissect a capture, and returns the given fields of each packet. A field that a packet has more than once
// has its values separated by commas. What tshark has to say against a packet fails the test; so payloads had better not look
// like one of the protocols that it guesses.
func Tshark(t testing.TB, capture []byte, fields ...string) [][]string {
	t.Helper()
	return TsharkWith(t, nil, capture, fields...)
}

// TsharkWith is Tshark with preferences, as its option -o has them.
func TsharkWith(t testing.TB, preferences []string, capture []byte, fields ...string) [][]string {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		Skip(t, "apt-get install tshark")
	}
	args := []string{"-r", "-", "-n", "-T", "fields", "-E", "separator=/t", "-o", "infiniband.identify_payload:FALSE"}
	for _, p := range preferences {
		args = append(args, "-o", p)
	}
	for _, p := range guessed {
		args = append(args, "--disable-protocol", p)
	}
	for _, f := range append([]string{"_ws.malformed", "_ws.expert.severity", "_ws.expert.message"}, fields...) {
		args = append(args, "-e", f)
	}
	cmd := exec.Command("tshark", args...)
	cmd.Stdin = bytes.NewReader(capture)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("tshark: %v: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var packets [][]string
	for i, line := range strings.Split(strings.TrimSuffix(string(out), "\n"), "\n") {
		values := strings.Split(line, "\t")
		if len(values) != len(fields)+3 {
			t.Fatalf("packet %d: %d fields: %q", i, len(values), line)
		}
		for _, severity := range strings.Split(values[1], ",") {
			if severity == chat && strings.Contains(values[2], "Possible traceroute") {
				continue // by the port, which the system has chosen
			}
			if severity == note && strings.Count(values[1], note) == 1 && strings.Contains(values[2], `"Time To Live" only 1`) {
				continue // which the programs of libibverbs want, as they reach no further than their subnet
			}
			if severity != "" && severity != comment || values[0] != "" {
				t.Errorf("packet %d: tshark says %q %q", i, values[0], values[2])
				break
			}
		}
		packets = append(packets, values[3:])
	}
	return packets
}
