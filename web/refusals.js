// A refused input is said once, at that input. The host repeats what a node's check says for every input that the check
// looks at; this pack's checks begin with the name of the input that is at fault.
import { api } from "../../scripts/api.js";

const REFUSED = /^(\S+) - ((\w+): .*)$/s; // "width - prompt: found nothing; ..."

function once(nodeErrors) {
  for (const { class_type, errors } of Object.values(nodeErrors ?? {})) {
    if (!class_type?.startsWith("LLaDAUni")) continue;
    const said = new Set();
    const kept = errors.filter(({ type, details }) => {
      const [, at, text, fault] = (type === "custom_validation_failed" && REFUSED.exec(details)) || [];
      if (!text) return true;
      const others = errors.some((error) => error.details === `${fault} - ${text}`);
      if (said.has(text) || (others && at !== fault)) return false;
      return said.add(text);
    });
    errors.splice(0, errors.length, ...kept);
  }
}

const queue = api.queuePrompt;
api.queuePrompt = async function (...given) {
  try {
    const answer = await queue.apply(this, given);
    once(answer?.node_errors);
    return answer;
  } catch (error) {
    once(error?.response?.node_errors);
    throw error;
  }
};
