package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
)

// softCase is one thing that `ringside perf` measures in the machine on two pairs of devices: two software NICs that talk RoCEv2
// through sockets, and rxe0 and rxe1. Both go over the same pair of network devices. The options are the command's defaults.
type softCase struct {
	op   string // send, write or read
	kind string // lat, rate or bw
	size int    // bytes
}

var softCases = []softCase{
	{"send", "lat", 8}, {"send", "lat", 64}, {"write", "lat", 8}, {"write", "lat", 64},
	{"send", "rate", 64},
	{"send", "bw", 65536}, {"write", "bw", 65536}, {"read", "bw", 65536},
}

func (c softCase) soft() string { return "soft " + c.op + " " + c.kind + " " + sizeName(c.size) }
func (c softCase) rxe() string  { return "rxe " + c.op + " " + c.kind + " " + sizeName(c.size) }

// metric is what is compared, and the factor that makes it the unit of the report.
func (c softCase) metric() (name, unit string, scale float64) {
	switch c.kind {
	case "lat":
		return "p50", "p50, us", 1
	case "rate":
		return "rate", "messages/s", 1
	}
	return "bw", "MB/s", 1000
}

func (c softCase) iters(quick bool) int {
	full := map[string]int{"lat": 2500, "rate": 40_000, "bw": 1000}[c.kind]
	if quick {
		return full / 20
	}
	return full
}

// softTargets are the numbers to reach, by the kind of measurement: soft over rxe.
var softTargets = map[string]target{"lat": {limit: 1}, "rate": {atLeast: true, limit: 1}, "bw": {atLeast: true, limit: 1}}

// pair are the two measurements.
func (c softCase) pair(r *vmRunner) []measurement {
	measure := func(path string, ends func() (client, server []string, err error)) func(*config) (values, error) {
		return func(*config) (values, error) {
			client, server, err := ends()
			if err != nil {
				return nil, err
			}
			args := []string{"perf", c.op, c.kind, "-o", "json", "--iters", strconv.Itoa(c.iters(r.plan.Quick)), "--size", strconv.Itoa(c.size)}
			return r.perf(append(args, client...), server, path, r.plan.Pin && c.kind == "lat")
		}
	}
	return []measurement{
		{c.soft(), measure("udp", r.softEnds)},
		{c.rxe(), measure("roce", func() (client, server []string, err error) { return rxeEnd(clientDevice), rxeEnd(serverDevice), nil })},
	}
}

// rxeEnd says which device, and which of its addresses.
func rxeEnd(device string) []string { return []string{"--device", device, "--gid-index", "1"} }

// softEnds are the software NIC at the addresses of the rxe devices: what one sends to the other crosses the veth pair.
func (r *vmRunner) softEnds() (client, server []string, err error) {
	if r.softGIDs == nil {
		out, err := exec.Command(r.plan.Ringside, "devices", "-o", "json", "soft0").Output()
		if err != nil {
			return nil, nil, fmt.Errorf("the addresses of soft0: %w", err)
		}
		if r.softGIDs, err = parseGIDs(out); err != nil {
			return nil, nil, err
		}
	}
	end := func(addr string) []string {
		index, ok := r.softGIDs[addr]
		if !ok {
			err = fmt.Errorf("soft0 has no address %s: %v", addr, r.softGIDs)
		}
		return []string{"--device", "soft0", "--gid-index", strconv.Itoa(index)}
	}
	client, server = append(end(clientAddr), "--path", "udp"), end(serverAddr)
	return client, server, err
}

// parseGIDs reads from the output of `ringside devices` for one device which of its GIDs has which IP address.
func parseGIDs(out []byte) (map[string]int, error) {
	var report struct {
		Devices []struct {
			Ports []struct {
				GIDs []struct {
					Index int    `json:"index"`
					Addr  string `json:"address"`
				} `json:"gids"`
			} `json:"ports"`
		} `json:"devices"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return nil, fmt.Errorf("ringside devices' output: %w: %q", err, out)
	}
	if len(report.Devices) != 1 || len(report.Devices[0].Ports) != 1 {
		return nil, fmt.Errorf("ringside devices' output is not about one port of one device: %q", out)
	}
	at := map[string]int{}
	for _, g := range report.Devices[0].Ports[0].GIDs {
		if g.Addr != "" {
			at[g.Addr] = g.Index
		}
	}
	return at, nil
}
